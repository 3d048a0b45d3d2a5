"""The command line: parse, call one function, render. One module a command group."""
