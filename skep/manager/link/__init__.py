"""Manager to manager: signs of life, and streams of data that one relays for another."""
