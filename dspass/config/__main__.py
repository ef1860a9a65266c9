"""``python -m dspass.config`` prints the page of all keys."""

from dspass.config.page import page

print(page(), end="")
