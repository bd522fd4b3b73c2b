"""The trainer: what runs on the GPU node, and survives it. Shipped to the node as a folder; never imports skyspot."""
