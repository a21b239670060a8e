"""Rules and values of HTTP. No I/O, no state of a connection: functions and what they are about."""
