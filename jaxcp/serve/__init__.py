# SPDX-License-Identifier: Apache-2.0
"""An HTTP server over one engine: OpenAI's interface, Anthropic's, and a page. Needs the extra
`serve`.
"""
