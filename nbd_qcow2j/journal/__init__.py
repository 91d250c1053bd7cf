"""The journal: what a transaction holds, where the ring has room, and what replay makes of it."""
