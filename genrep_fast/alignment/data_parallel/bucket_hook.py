"""DistributedDataParallel averages every backward pass, and its hook computes Gram matrices."""

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...ops.alignment import gram_operator
from ..collected import CollectedGradients
from ..tensor_grams import TensorGrams
from .ownership import check_no_join, check_wrapper
from .strategy import Strategy


class BucketHook(Strategy):
    """Each pass is averaged bucket by bucket while it runs.

    Once all losses but one have been collected, the Gram matrices of a bucket's tensors are
    computed when the bucket arrives, while others are on their way.

    Args:
        wrapper: DistributedDataParallel without a communication hook.
        parameters: of the aligner.
        names: of the losses.

    Raises:
        ValueError: for a wrapper with options under which that does not work.
    """

    def __init__(
        self, wrapper: DistributedDataParallel, parameters: Sequence[Tensor], names: Sequence[str]
    ):
        super().__init__(parameters)
        check_wrapper(wrapper)
        if wrapper.static_graph:
            raise ValueError(
                'reduce="hook" needs a DistributedDataParallel without static_graph, as the losses '
                'have different graphs: use reduce="no_sync" or "sharded"'
            )
        self._wrapper = wrapper
        self._names = names
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        # Losses whose last pass was averaged.
        self._averaged: set[int] = set()
        self._pass: _Pass | None = None
        _listen(wrapper, self)

    @property
    def adds_up(self) -> bool:
        return True

    def check_joint(self, last_call: str) -> None:
        pass

    def flat(self, wanted: bool) -> bool:
        # The next pass would write over gradients that lie in the wrapper's buckets.
        return wanted or self._wrapper.gradient_as_bucket_view

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        check_no_join(self._wrapper)
        self._averaged.discard(loss)
        self._pass = _Pass(loss, collected.gradients if is_last else None)

    def arm(self, loss: Tensor) -> None:
        wrapper = self._wrapper
        if not wrapper.require_backward_grad_sync:
            return
        outputs = [loss] if wrapper.find_unused_parameters else []
        wrapper.reducer._rebuild_buckets()
        wrapper.reducer.prepare_for_backward(outputs)
        assert self._pass is not None
        self._pass.began = True

    def end(self, loss: int, name: str, grams: TensorGrams) -> None:
        done, self._pass = self._pass, None
        if done is None:
            return
        if not done.began:
            self._check_no_sync()
            return
        if not done.ended:
            raise RuntimeError(
                f"the loss {name} does not reach every parameter, so that "
                "DistributedDataParallel did not finish averaging: wrap with "
                'find_unused_parameters=True, or use reduce="no_sync" or "sharded"'
            )
        self._averaged.add(loss)
        done.give(grams)

    def _check_no_sync(self) -> None:
        """Raise RuntimeError where the wrapper takes what one loss reaches for another's."""
        if self._wrapper.find_unused_parameters and not self._wrapper.require_backward_grad_sync:
            raise RuntimeError(
                "no_sync cannot be used with find_unused_parameters=True, as "
                "DistributedDataParallel would mix up what the losses reach: leave no_sync out, or "
                'use reduce="no_sync" or "sharded", which average once a step'
            )

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        missing = [name for i, name in enumerate(self._names) if i not in self._averaged]
        if missing:
            raise RuntimeError(
                f"the last backward pass of {', '.join(missing)} was not averaged: run the last "
                "pass of each loss outside of no_sync, and its forward pass through the wrapper, "
                "with find_unused_parameters=True where a loss does not reach every parameter; "
                'or use reduce="no_sync" or "sharded", which average once a step'
            )

    def reduce_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average `bucket` over the processes, and compute its Gram matrices when it arrives."""
        future = _averaged(bucket, self._wrapper.process_group)
        running = self._pass
        if running is None:
            return future
        running.began = True
        if bucket.is_last():
            running.ended = True
            running.watch_end()
        if running.gradients is None:
            return future
        known = [
            (self._index[id(parameter)], parameter, _as_written(gradient, parameter))
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
            if id(parameter) in self._index
        ]

        def compute(future: torch.futures.Future[Tensor]) -> Tensor:
            running.compute(known)
            return future.value()

        return future.then(compute)


class _Pass:
    """One backward pass, and the Gram matrices that became known in it.

    Args:
        loss: its number.
        gradients: for each loss, of every parameter; None while others are missing.
    """

    def __init__(self, loss: int, gradients: list[list[Tensor | None]] | None):
        self.gradients = gradients
        # Whether the wrapper began to average it, and whether the last bucket went out.
        self.began = self.ended = False
        self._loss = loss
        self._lock = threading.Lock()
        self._parameters: dict[int, Tensor] = {}
        self._matrices: list[tuple[list[int], Tensor]] = []
        # Of each gradient, as the wrapper left it, and the count of writes to it.
        self._left: dict[int, tuple[Tensor, int]] = {}

    def watch_end(self) -> None:
        """Look at the gradients once the wrapper has written them to ``.grad``."""
        # A callback of this pass is called before the wrapper's own, one of a callback after it.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._look))

    @torch.no_grad()
    def compute(self, known: list[tuple[int, Tensor, Tensor]]) -> None:
        """Compute the matrices of a bucket: indices, parameters and averaged gradients."""
        assert self.gradients is not None
        if not known:
            return
        indices = [index for index, _, _ in known]
        gradients: list[Tensor | None] = []
        for loss, of_loss in enumerate(self.gradients):
            if loss == self._loss:
                gradients += [gradient for _, _, gradient in known]
            else:
                gradients += [of_loss[index] for index in indices]
        rows = list(range(len(indices)))
        matrices = gram_operator(gradients, len(self.gradients), rows, len(rows))
        # Buckets may arrive in several threads.
        with self._lock:
            self._matrices.append((indices, matrices))
            self._parameters.update((index, parameter) for index, parameter, _ in known)

    def give(self, grams: TensorGrams) -> None:
        """Give `grams` the matrices of gradients that nobody has changed since."""
        for indices, matrices in self._matrices:
            if all(self._is_unchanged(index) for index in indices):
                if matrices.is_cuda:
                    matrices.record_stream(torch.cuda.current_stream(matrices.device))
                grams.add(indices, matrices)

    def _look(self) -> None:
        for index, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._left[index] = (parameter.grad, parameter.grad._version)

    def _is_unchanged(self, index: int) -> bool:
        gradient = self._parameters[index].grad
        if index not in self._left:
            return gradient is None
        left, version = self._left[index]
        return gradient is left and left._version == version


class _Listener:
    """What a wrapper's hook calls: a strategy while it lives, which another one may replace."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.strategy: Callable[[], BucketHook | None] = lambda: None


_listeners: "weakref.WeakKeyDictionary[DistributedDataParallel, _Listener]" = (
    weakref.WeakKeyDictionary()
)


def _listen(wrapper: DistributedDataParallel, strategy: BucketHook) -> None:
    """Have the hook of `wrapper` call `strategy`.

    A wrapper takes one hook, for good.
    """
    if wrapper not in _listeners:
        if wrapper._comm_hooks:
            raise ValueError(
                'reduce="hook" needs a DistributedDataParallel without a communication hook, as '
                "it takes one: make the aligner of the module inside and run a forward pass for "
                "each loss"
            )
        listener = _Listener(wrapper.process_group)
        wrapper.register_comm_hook(listener, _reduce_bucket)
        _listeners[wrapper] = listener
    _listeners[wrapper].strategy = weakref.ref(strategy)


def _reduce_bucket(state: _Listener, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    strategy = state.strategy()
    if strategy is None:
        return _averaged(bucket, state.group)
    return strategy.reduce_bucket(bucket)


def _as_written(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient of a bucket with its elements where they belong.

    The wrapper writes it with the strides of its parameter (channels_last), and shows it without.
    """
    if parameter.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride())


def _averaged(
    bucket: dist.GradBucket, group: dist.ProcessGroup
) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer().div_(group.size())
    future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
    return future.then(lambda future: future.value()[0])
