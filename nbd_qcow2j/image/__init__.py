"""The qcow2 engine: mapping, allocation, backing files, compressed clusters, snapshots, check."""
