"""What is on disk: the layout of a checkpoint, its one reader and its checks, and the model card."""
