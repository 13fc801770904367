"""Who may call: what a caller shows, who that is, and how much a tenant may have.

Decisions are pure (`wish`, `jwks`, `tokens`, `minted`, `limits`, `doorstep`, `pace`); `issuers` fetches keys and
`door` puts it all together. All of it happens before a caller's 101.
"""
