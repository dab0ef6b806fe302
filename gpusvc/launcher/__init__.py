"""ExecStart= of model@NAME.service: one run of a model."""
