"""Where the time of a step goes: recorded, written as a trace, summed up and drawn."""
