"""The embedded stack: Work API emulator, local AWS and demo; nothing that the deployed functions import."""
