"""What tasks have in common: finding the answer in a text, and comparing it with the right one."""
