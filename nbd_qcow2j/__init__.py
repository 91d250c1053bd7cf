"""A journalled qcow2 image as a network block device: read README.md, then driver.py, then disk.py."""

__version__ = "0.1.0"
