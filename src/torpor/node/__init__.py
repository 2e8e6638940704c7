"""A node: functions and instances, their lifecycle, and the journal. Where the parts meet."""
