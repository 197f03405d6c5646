"""Tests may be started in the background, where a shell ignores Ctrl-C; what they start must not inherit that."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
