"""Untrusted XML: parser targets that refuse a DOCTYPE, which can declare entities that fill the memory.

Without a DOCTYPE, `xml.etree.ElementTree.XMLParser` expands only XML's five predefined entities and never opens another
file.
"""


class XmlError(Exception):
    """Unusable XML file; the message is a short reason."""


class NoDoctype:
    """Base class of the targets of `xml.etree.ElementTree.XMLParser`."""

    def doctype(self, *_: str | None) -> None:
        """Refuse the declaration of a document type.

        Raises:
            XmlError: Always.
        """
        raise XmlError("broken XML: it has a DOCTYPE, which may declare entities")
