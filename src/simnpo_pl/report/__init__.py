"""Reports over finished runs: one page to read offline, Markdown with figures for papers, LaTeX rows."""
