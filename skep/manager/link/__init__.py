"""Links between managers: heartbeats, and streams of data that one manager relays for another."""
