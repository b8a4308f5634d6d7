"""How one task is trained: the LightningModule, its patch, its probe and its Trainer."""
