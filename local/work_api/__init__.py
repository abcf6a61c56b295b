"""The Work API emulator: a queue, scripted sessions and their server; nothing of the fleet itself."""
