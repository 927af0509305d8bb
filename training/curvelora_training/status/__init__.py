"""How runs stand, from their folders alone: nothing is asked of a scheduler, and nothing is written."""
