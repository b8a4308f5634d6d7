"""How one task is trained: its network, the LightningModule, the Trainer, checkpoints, the probe and the patch."""
