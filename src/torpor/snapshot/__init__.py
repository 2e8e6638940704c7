"""What a snapshot is: its manifest, its files on a node, its way through a store."""
