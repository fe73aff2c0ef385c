from embed.cli import entry

entry()
