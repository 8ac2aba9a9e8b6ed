"""What is moved, with the real containerd, runc, CRIU, kernel and disk behind it: the one implementation of the engine's ports."""
