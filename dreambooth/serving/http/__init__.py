"""Serve HTTP: the socket, the routes, and the order of start and end."""
