"""Events to other places: a file, a webhook, a Redis stream; in order, and at least once.

The buffer is the events table on disk, and each sink remembers how far it came: an outage, of the place or of the daemon, loses nothing
for as long as the events are kept (the last 20,000), and what was lost beyond that is told.

    settings   sinks.toml of the state directory
    envelope   an event as a CloudEvent
    progress   how far each sink came, on disk
    places     where events go: file, webhook, Redis
    pump       one sink: read on, deliver, remember; wait longer after each failure
    joined     all sinks of one daemon
"""
