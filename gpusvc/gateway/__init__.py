"""The gateway: one address for all models, which are loaded when somebody asks for them."""
