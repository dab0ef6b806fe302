"""What the kernel shows as files and calls: control groups, processes, sockets, users."""
