"""A simulation of the whole fleet: real functions and handlers, everything outside them simulated, faults by seed."""
