"""Control groups, processes, sockets and users, as the kernel shows them."""
