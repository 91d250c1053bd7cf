"""Bytes to objects and back: qcow2's control structures and the journal's. Nothing here does I/O."""
