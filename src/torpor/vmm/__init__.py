"""Virtual machine monitors: one interface with a state machine, a folder for each driver."""
