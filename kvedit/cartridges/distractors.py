"""Distractors: other memories beside the target, so that it learns to stand among them.

Cartridges that are trained alone fall to chance where several are loaded; training with others
in view keeps them apart (Cartridges at scale, arXiv 2606.04557).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvedit.cartridges.order import draws
from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.prefix import Prefix, join
from kvedit.editors.concat import Concat
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, ModelSpec

__all__ = ["Distractors"]


class Distractors:
    """Frozen memories of which some stand beside the target in some steps.

    Args:
        memories: the others.
        start: the target, to check that all can stand together.
        plan: how often, how many, and whether rotated.
        device: where the model computes.

    Raises:
        InvalidArgument: if the plan wants distractors and there are none, or the reverse; or
            memories can't stand together (see :class:`~kvedit.editors.concat.Concat`).
    """

    def __init__(
        self,
        memories: Sequence[KVMemory],
        start: KVMemory,
        plan: TrainPlan,
        device: torch.device,
    ) -> None:
        """Moves them to the device."""
        if bool(memories) != (plan.distractors > 0):
            raise InvalidArgument(
                f"the plan's fraction of steps with distractors is {plan.distractors}, and "
                f"{len(memories)} were given: give both or neither"
            )
        self.plan = plan
        self.count = min(plan.max_distractors, len(memories))
        longest = sorted(memories, key=lambda m: m.next_position)[-self.count :]
        if memories:
            # Every one fits, and as many as there may be at once: all refusals come before step 1.
            for other in memories:
                Concat(rotate=plan.rotate)(other, start)
            Concat(rotate=plan.rotate)(*longest, start)
        self.prefixes = [Prefix.of(memory, device) for memory in memories]
        self.reach = sum(m.next_position for m in longest) if memories else 0

    def beside(self, target: Prefix, step: int, spec: ModelSpec) -> Prefix:
        """Returns what stands in front of the samples of a step: the target, at any place.

        Which ones, and in which order, depends on seed and step alone.
        """
        if not self.prefixes:
            return target
        generator = draws(self.plan.seed, "distractors", step)
        if float(torch.rand((), generator=generator)) >= self.plan.distractors:
            return target
        count = int(torch.randint(1, self.count + 1, (), generator=generator))
        chosen = torch.randperm(len(self.prefixes), generator=generator)[:count].tolist()
        parts = [self.prefixes[number] for number in chosen]
        parts.insert(int(torch.randint(count + 1, (), generator=generator)), target)
        return join(parts, spec, self.plan.rotate)
