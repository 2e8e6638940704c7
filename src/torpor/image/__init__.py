"""What a guest is made of: images, kernel, initramfs, and the protocol of the agent inside.

`kernel` makes what every guest boots (`guest/` has the sources of its init); `agent` speaks to the
init of a running guest.
"""
