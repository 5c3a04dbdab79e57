"""What the host wants to know of the training steps, kept on the device, so that it waits for none of them.

The host reads one small tensor every `STEPS_BETWEEN_READS` steps. Until then a step whose loss or gradients are NaN or
infinite has changed no weight, and neither has any step after it: the optimizer leaves out what `found_inf` tells it to.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STEPS_BETWEEN_READS = 20
# fp16 halves its loss scale after an overflow; from 2^16, this many in a row are no longer a search for a scale.
MAX_SKIPPED_STEPS = 40
MOST = torch.finfo(torch.float32).max


class Reading(NamedTuple):
    """What the host reads. The sums are over the epoch so far; `broken` is the first step of the watch, counted from 0,
    that was not finite, and -1 where there was none.
    """

    loss_sum: float
    correct: int
    seen: int
    batch_loss: float
    skipped_in_a_row: int
    broken: int


class Watch:
    """Sums of loss and right answers, and a stop for NaN and infinity, without a word to the host.

    Call `look` in each step between its backward and the optimizer's step; `read` when the host wants to know.

    Args:
        optimizer: torch's own, with a fused step, which heeds `found_inf`. It can be watched once.
        parameters: names and parameters, as of `named_parameters()`.
        reduce: sums a tensor over all processes; None where there is one.
        scaled: whether a GradScaler searches its scale: its overflows leave out a step each, and only more than
            `MAX_SKIPPED_STEPS` in a row are a fault.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[tuple[str, nn.Parameter]],
        reduce: Callable[[Tensor], Tensor] | None = None,
        scaled: bool = False,
    ) -> None:
        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._reduce, self._scaled = reduce, scaled
        device = self._parameters[0].device
        number = partial(torch.zeros, (), dtype=torch.int64, device=device)
        # Apple's GPUs have no fp64.
        real = torch.float32 if device.type == "mps" else torch.float64
        self._loss_sum, self._batch_loss = (torch.zeros((), dtype=real, device=device) for _ in range(2))
        self._correct, self._seen, self._steps, self._skipped = (number() for _ in range(4))
        # Of the first step that was not finite: its number, its loss, and the norm of each gradient.
        self._broken = number() - 1
        self._values = torch.zeros(1 + len(trained), device=device)
        # 1 from that step on, in the optimizer's form
        self._stop = torch.zeros((), device=device)
        # What a loss and a norm may be, of which Adam keeps the square.
        self._most = torch.full((1 + len(trained),), MOST**0.5, device=device)
        self._most[0] = MOST
        optimizer.register_step_pre_hook(self._tell)

    def start_epoch(self, loss_sum: float, correct: int, seen: int, skipped_in_a_row: int) -> None:
        """Go on from these sums."""
        self._loss_sum.fill_(loss_sum)
        self._correct.fill_(correct)
        self._seen.fill_(seen)
        self._skipped.fill_(skipped_in_a_row)

    @torch.no_grad()
    def look(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a step: its mean loss, its logits [B, 2] for labels [B], and the gradients that it left, unscaled."""
        correct = (logits.argmax(dim=-1) == labels).sum()
        if self._reduce is None:
            self._batch_loss.copy_(loss)
            self._loss_sum.add_(loss, alpha=len(labels))
            self._correct += correct
            self._seen += len(labels)
        else:
            own = [
                loss.detach().to(self._loss_sum) * len(labels),
                correct,
                torch.full_like(correct, len(labels)),
            ]
            loss_sum, correct, seen = self._reduce(torch.stack([x.to(self._loss_sum) for x in own])).unbind()
            self._batch_loss.copy_(loss_sum / seen)
            self._loss_sum += loss_sum
            self._correct += correct.long()
            self._seen += seen.long()
        self._find_fault()
        self._steps += 1

    def _find_fault(self) -> None:
        gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in self._parameters]
        norms = torch._foreach_norm(gradients)
        values = torch.stack([self._batch_loss.float(), *(norm.float() for norm in norms)])
        # NaN is no less than anything.
        fault = (values <= self._most).all().logical_not_()
        if self._scaled:
            self._skipped.copy_(torch.where(fault, self._skipped + 1, 0))
            fault &= ~(values[0] <= MOST) | (self._skipped > MAX_SKIPPED_STEPS)
        is_first = fault & (self._broken < 0)
        torch.where(is_first, values, self._values, out=self._values)
        torch.where(is_first, self._steps, self._broken, out=self._broken)
        self._stop.copy_(self._broken >= 0)

    def _tell(self, optimizer: Any, *_: object) -> None:
        """Before each step of the optimizer, in which a GradScaler may have its own word."""
        found = getattr(optimizer, "found_inf", self._stop)
        optimizer.found_inf = self._stop if found is self._stop else torch.maximum(found, self._stop)

    def read(self) -> Reading:
        """Wait for the device and read."""
        whole = torch.stack([self._correct, self._seen, self._skipped, self._broken])
        numbers = torch.cat([torch.stack([self._loss_sum, self._batch_loss]), whole.to(self._loss_sum)])
        loss_sum, batch_loss, correct, seen, skipped, broken = numbers.tolist()
        return Reading(loss_sum, int(correct), int(seen), batch_loss, int(skipped), int(broken))

    def fault(self) -> tuple[float, float, list[str]]:
        """Of the first step that was not finite: its loss, its gradient norm, and whose gradients were not.

        A gradient whose norm fp32 cannot square counts among those.
        """
        loss, *norms = self._values.tolist()
        most = self._most[1].item()
        broken = [name for name, norm in zip(self.names, norms, strict=True) if not norm <= most]
        return loss, math.hypot(*norms), sorted(broken)
