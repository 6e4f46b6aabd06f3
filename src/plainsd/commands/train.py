"""`plainsd train`: one command for all training methods."""

import sys
from dataclasses import dataclass, replace

from plainsd.errors import UserError
from plainsd.train import options
from plainsd.train.checks import METHODS_OF, as_flag, check_methods, check_ranges, check_together


@dataclass
class Train(options.TrainOptions):
    """Trains on captioned pictures. Run again with the same --out, it resumes."""

    def run(self) -> int:
        """0, also where SIGTERM stopped the run and it was saved; 1 where the disk was full, which a line on stderr
        says, with the state that is intact."""
        import torch

        from plainsd.device import choose_device, choose_dtype
        from plainsd.train.checkpoints import SaveError, checkpoints
        from plainsd.train.claim import locked
        from plainsd.train.from_model import train_controlnet, train_full, train_inversion, train_lora
        from plainsd.train.from_scratch import train_scratch, train_vae
        from plainsd.train.job import TrainJob
        from plainsd.train.processes import world_of_torchrun

        task = {
            "vae": train_vae,
            "scratch": train_scratch,
            "full": train_full,
            "lora": train_lora,
            "inversion": train_inversion,
            "controlnet": train_controlnet,
        }[self.method]
        if self.method in ("vae", "scratch") and (self.prediction or self.zero_snr):
            raise UserError(
                f"--prediction and --zero-snr describe the UNet of --base, which method {self.method} does not use; "
                "leave them out"
            )
        if self.pace.dtype == "float16":
            raise UserError(
                "--dtype float16 is too narrow for gradients; give bfloat16, float32, or auto", field="dtype"
            )
        check_methods(self)
        loss = options.with_loss_defaults(self)
        filled = replace(self, pace=options.with_defaults(self.method, self.pace), loss=loss)
        check_ranges(self.reading, self.loss, self.lora, self.inversion, self.prior, self.telling, self.from_scratch)
        check_together(self)
        device = choose_device(self.pace.device)
        by_default = "bfloat16" if self.lora.half_base else "auto"
        dtype = choose_dtype(by_default if self.pace.dtype == "auto" else self.pace.dtype, device)
        with world_of_torchrun(device, self.pace.shard) as world, locked(self.out, world):
            try:
                job = TrainJob(filled, world, dtype)
                job.draw_seed()
                job.check_name()
                job.check_means()
                task(job)
            except SaveError as error:
                states = checkpoints(self.out / "checkpoints")
                kept = (
                    f"the checkpoint of step {int(states[-1].name[5:])} is intact"
                    if states
                    else "there is no checkpoint"
                )
                print(
                    f"plainsd: {error}; {kept}; free disk space and run the same command again to resume",
                    file=sys.stderr,
                )
                return 1
            except torch.OutOfMemoryError:
                states = checkpoints(self.out / "checkpoints")
                kept = f"the last state is {states[-1]}" if states else "there is no checkpoint"
                raise UserError(f"out of memory; try {less_memory(self.method)}; {kept}") from None
        return 0


def less_memory(method: str) -> str:
    """What a method can do with less memory: in the same run, and in another."""
    same, names = "--checkpointing, or " if method in METHODS_OF["checkpointing"] else "", ("half_base", "adam8bit")
    *others, last = ["--batch 1", *(as_flag(name) for name in names if method in METHODS_OF.get(name, (method,)))]
    return f"{same}{', '.join(others)} or {last} with another --out"
