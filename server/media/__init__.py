"""What clients attach: types, documents, PDFs."""
