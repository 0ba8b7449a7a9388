"""Gram matrices of tensors of which a process holds a part."""

import torch

from genrep_fast.alignment.tensor_grams import TensorGrams


def test_matrices_are_reduced_once_when_they_are_computed():
    gradients = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    calls = []

    def double(matrices, tensors):
        calls.append(tensors)
        return 2 * matrices

    def of(tensors):
        return [gradients[loss, tensor] for loss in range(2) for tensor in tensors]

    grams = TensorGrams(2, double)
    expected = 2 * torch.einsum("itk,jtk->tij", gradients, gradients)
    torch.testing.assert_close(grams.matrices([1, 3], of), expected[[1, 3]])
    torch.testing.assert_close(grams.matrices([4, 3, 0], of), expected[[4, 3, 0]])
    assert calls == [[1, 3], [4, 0]]
    grams.clear()
    torch.testing.assert_close(grams.matrices([3], of), expected[[3]])
    assert calls == [[1, 3], [4, 0], [3]]
