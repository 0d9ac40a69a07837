"""Workers: the processes that train one cartridge together, through accelerate."""

from __future__ import annotations

import os

import torch

from kvedit.errors import InvalidArgument, UnsupportedModel

__all__ = ["Workers"]


class Workers:
    """This process among those that ``accelerate launch`` or ``torchrun`` started; one without.

    Every process holds the whole frozen model and the whole cartridge, and takes its share of a
    step's rows. Gradients are summed in one message: they are as small as the cartridge. The base
    model is not wrapped, since nothing of it is trained.

    Args:
        device: the model's device; on the CPU, processes talk through gloo.

    Raises:
        UnsupportedModel: if accelerate was told to shard the model.
    """

    def __init__(self, device: torch.device) -> None:
        """Joins the process group, if there is one."""
        from accelerate import PartialState

        for name, kind in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise UnsupportedModel(
                    f"accelerate was told to use {kind}, which shards the model: a cartridge is "
                    "trained with the frozen model whole on every process; launch with --multi_gpu "
                    "or --multi_cpu (docs/training.md)"
                )
        self.state = PartialState(cpu=device.type == "cpu")
        self.device = device

    @property
    def index(self) -> int:
        """Number of this process."""
        return int(self.state.process_index)

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self.state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes, logs and shows progress."""
        return bool(self.state.is_main_process)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.state.wait_for_everyone()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of all processes' tensors, the same bits in each of them."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        summed: torch.Tensor = reduce(tensor, reduction="sum")
        return summed

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over processes; a missing one counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, piece in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def agree(self, what: str) -> None:
        """Raises unless all processes were given the same.

        Args:
            what: digest of start, samples and plan.

        Raises:
            InvalidArgument: if they differ.
        """
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        if len(set(gather_object([what]))) > 1:
            raise InvalidArgument(
                "the processes were given different starts, samples or plans: all must get the same"
            )
