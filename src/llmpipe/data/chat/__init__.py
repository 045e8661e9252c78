"""Chats to tokens and roles: rows → conversations → rendered text whose turns are known → ids and roles."""
