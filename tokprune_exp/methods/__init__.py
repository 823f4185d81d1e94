"""The methods: one page each, over the shared LightningModule of `module.py`."""
