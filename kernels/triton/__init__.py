"""Triton kernels; installed as `genrep_fast.kernels`.

A file an operator, or what belongs to it: `alignment`, `optimizer`, `scoring`, `scoring_backward`,
`posterior` and `reverse_step` have the functions that `genrep_fast.dispatch.libraries` registers.
`scoring_chunk`, `residuals` and `states` are what scoring shares, `multi_tensor` what kernels of
tensor lists do. csrc's stems "scoring_locations" and "shared_centers" are kinds of a tile here, for
which one kernel is compiled: they stand in its name, not in a file's.
"""
