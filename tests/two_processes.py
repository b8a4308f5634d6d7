"""Trains a task by every method in two processes; each writes digests of what it ends with to OUTPUT/RANK.json.

Usage: torchrun --nproc_per_node 2 two_processes.py FOLDER OUTPUT NAMES...
"""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from test_all_methods import METHODS, QUIET

from recast_pl import SequentialTaskDataModule, TaskConfig, TILModule
from recast_pl.files import sha256

folder, output, *names = sys.argv[1:]
digests = {}
for name in names:
    torch.manual_seed(0)
    module = TILModule(*METHODS[name]())
    data = SequentialTaskDataModule([TaskConfig("first", folder)], image_size=32, batch_size=4)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", **QUIET)
    trainer.fit(module, datamodule=data)
    trainer.strategy.barrier()
    states = [
        module.patch({}).to_bytes(),
        *(t.numpy().tobytes() for s in module.shared_state().pieces for t in s.values()),
    ]
    digests[name] = sha256(b"".join(states))
(Path(output) / f"{os.environ['RANK']}.json").write_text(json.dumps(digests))
