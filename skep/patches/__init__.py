"""Changes to other projects' modules at import.  Each names what upstream would have to offer instead."""
