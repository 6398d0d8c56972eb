"""Results for people: report, page, figures."""
