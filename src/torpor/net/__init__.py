"""Network slots: one integer -> all addresses; apply them, check them, take them back."""
