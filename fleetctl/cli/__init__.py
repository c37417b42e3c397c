"""The command line: parse, call the engine, render. `app` is the entry; each command is loaded when it is called."""
