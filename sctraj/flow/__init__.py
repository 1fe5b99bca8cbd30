"""Flow matching itself, on tensors: couple the snapshots, choose paths between the paired cells, learn the velocity."""
