"""The Python bridge: the default path of a switch with ``bridge: python``, in a process of its own.

The walk of a frame::

    tc program of the member's device        pushes an 802.1ad tag: the member's port id
    -> SWITCH ===== SWITCH-py                a veth pair: the conduit
    -> ring of a packet socket               offload.kernel.packet
    -> worker.Worker                         reads the tag, asks the extensions
    -> switch.Switch                         learns, and says which members get it
    -> packet socket, SWITCH-py ===== SWITCH under a tag that names the member it is for
    -> tc program there                      pops the tag and sends it out of that member's device

Who the members are is in RUN_DIR/bridges/SWITCH.json (``membership``), which the controller writes; what
became of the frames is in RUN_DIR/bridges/SWITCH.stats.json (``state``). Neither side waits for the other.

Two processes: ``supervisor`` holds the socket and starts the worker, which does the rest. When an extension
takes the worker with it, the next worker goes on with the same ring, without that extension.
"""
