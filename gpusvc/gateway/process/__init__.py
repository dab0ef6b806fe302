"""The processes of the gateway: sockets, workers, TLS."""
