"""Talking to the Hub: time limits, checked answers, retries, and errors explained in one sentence."""
